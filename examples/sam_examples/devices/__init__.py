"""Devices that share arrays, and processes that share devices."""
