"""What a user does from Python, and commands do as their flags say: prepare, plan, train, judge, export, load."""
