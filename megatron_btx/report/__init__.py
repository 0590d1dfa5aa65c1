"""Reports: what a run's files say, as claims, tables, figures and pages."""
