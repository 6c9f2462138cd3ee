"""Records become findings: tables, diagnoses and figures, the same for a live watch and for a finished run."""
