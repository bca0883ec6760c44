"""The report of a run: one HTML page, and the same numbers as CSV and LaTeX. Data goes in, text comes out."""
