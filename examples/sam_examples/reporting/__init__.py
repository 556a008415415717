"""Figures as tables, plots and files of metrics."""
