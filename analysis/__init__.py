"""Reads run folders and turns them into tables, plots and a report."""
