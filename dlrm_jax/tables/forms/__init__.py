"""How tables are spread over a mesh: one file a sharding type; docs/ADDING.md says how to add one."""

import importlib

from dlrm_jax.tables.forms.base import FORMS, Form, form_of, register

__all__ = ["FORMS", "Form", "form_of", "register"]

for _name in ("data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise"):  # As flags list them.
    importlib.import_module(f"{__name__}.{_name}")
