"""Fault injection around a server, with checks that its memory is accounted for afterwards."""
