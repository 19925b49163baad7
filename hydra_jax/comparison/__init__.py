"""Matched training runs compared: sweeps of each, what differs by arm, and its pages and figures."""
