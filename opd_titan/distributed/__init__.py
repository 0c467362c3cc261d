"""Processes, the device mesh, and the few collectives that the program calls directly."""
