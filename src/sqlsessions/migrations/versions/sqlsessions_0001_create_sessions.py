"""Create the session table.

Frozen: it says what version 0.1 made and never imports sqlsessions.schema, which moves on.
"""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "sqlsessions_0001"
down_revision = None
branch_labels = ("sqlsessions",)
depends_on = None


def upgrade(op: Operations, table: str, schema: str | None) -> None:
    op.create_table(
        table,
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("user_id", sa.String(255)),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("client", sa.JSON),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("authenticated_at", sa.DateTime(timezone=True)),
        sa.Column("idle_timeout", sa.Integer),
        sa.Column("persistent", sa.Boolean, nullable=False),
        sa.Column("format", sa.SmallInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"{table}_pkey"),
        schema=schema,
    )
    # Far more updates than inserts: room on the page keeps them HOT, and early vacuums keep it there. A statement of
    # its own, since SQLAlchemy takes storage parameters for a table only from 2.1 on.
    dialect = op.get_context().dialect
    if dialect.name == "postgresql":
        name = dialect.identifier_preparer.format_table(sa.table(table, schema=schema))
        op.execute(
            f"ALTER TABLE {name} SET "
            "(fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05)"
        )
    op.create_index(f"{table}_expires_at", table, ["expires_at"], schema=schema)
    owned = sa.text("user_id IS NOT NULL")
    op.create_index(f"{table}_user_id", table, ["user_id"], schema=schema, postgresql_where=owned, sqlite_where=owned)


def downgrade(op: Operations, table: str, schema: str | None) -> None:
    op.drop_table(table, schema=schema)
