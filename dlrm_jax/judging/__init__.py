"""How good a scored model is: by user, by slice, with intervals, beside another one, and which columns it lives on."""
