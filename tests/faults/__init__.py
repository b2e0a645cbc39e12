"""Faults at the steps of the protocol, put there from outside (docs/reliability.md)."""
