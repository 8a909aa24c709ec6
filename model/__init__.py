"""What is trained, and the frozen backbone under it."""
