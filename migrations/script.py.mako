<%
    # Only what the migration uses is imported: ruff refuses the rest.
    body = f"{context.get('upgrades')} {context.get('downgrades')}"
%>\
"""${message}."""

% if "sa." in body:
import sqlalchemy as sa
% endif
% if "sqlmodel." in body:
import sqlmodel.sql.sqltypes
% endif
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Apply the change."""
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    """Undo the change."""
    ${downgrades if downgrades else "pass"}
