"""table_row_wise tables: row_wise, within a group of neighbouring shards."""

from dlrm_jax.tables.forms.base import GROUP, register
from dlrm_jax.tables.forms.row_wise import RowWise


@register("table_row_wise")
class TableRowWise(RowWise):
    """Rows dealt out to the shards of a group; in the stacks of row_wise."""

    span = GROUP
