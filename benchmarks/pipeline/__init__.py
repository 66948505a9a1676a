"""What is claimed of the runtime and of its schedules, measured."""
