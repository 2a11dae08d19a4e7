"""How a table is spread over a mesh: one file a sharding type's form, each with route, lookup, update and sent."""

from dlrm_jax.tables.forms import column_wise, data_parallel, row_wise, table_wise
from dlrm_jax.tables.layout import COLUMNS, OWNED, REPLICATED, ROUTED

FORMS = {REPLICATED: data_parallel, OWNED: table_wise, ROUTED: row_wise, COLUMNS: column_wise}
