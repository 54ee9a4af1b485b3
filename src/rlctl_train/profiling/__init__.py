"""Where time and memory go: named ranges, tools that record them in the workers, and what a report reads from both."""
