"""The session table, as a revision of the application's own: see "One history" in README.md."""

from sqlsessions import migrate

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make our table."""
    migrate.apply("sqlsessions_0001")


def downgrade() -> None:
    """Drop it."""
    migrate.reverse("sqlsessions_0001")
