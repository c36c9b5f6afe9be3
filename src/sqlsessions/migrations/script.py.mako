"""${message.capitalize().rstrip(".")}.

Frozen once released: it says what its version made and never imports sqlsessions.schema, which moves on.
"""

import sqlalchemy as sa
from alembic.operations import Operations
${(imports + "\n") if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


# Write what autogenerate put here out for any table: {table}_…, schema=schema.
def upgrade(op: Operations, table: str, schema: str | None) -> None:
    ${upgrades if upgrades else "pass"}


def downgrade(op: Operations, table: str, schema: str | None) -> None:
    ${downgrades if downgrades else "pass"}
