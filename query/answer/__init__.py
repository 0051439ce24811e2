"""What an answer holds, and the forms it is written in."""
