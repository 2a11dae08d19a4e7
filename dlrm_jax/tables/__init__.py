"""What is expensive: where rows lie, how they are looked up and updated, on one device and over a mesh."""
