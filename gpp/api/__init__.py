"""What a user calls in a program of their own, and what the commands are made of."""
