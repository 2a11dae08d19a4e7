"""What it costs: bytes, memory and time of a plan, predicted from shapes, and the plan that costs least."""
