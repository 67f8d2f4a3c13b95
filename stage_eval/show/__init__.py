"""From figures to tables, plots and pages."""
