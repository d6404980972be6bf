"""What one sees of a run. Observers get the value of a finished step and change nothing."""
