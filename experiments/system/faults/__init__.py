"""What goes wrong around a server, and whether its memory adds up afterwards."""
