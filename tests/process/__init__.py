"""Tests that need real processes: schedulers, workers and clients that share nothing but a pool."""
