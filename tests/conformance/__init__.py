"""What users expect in situations that break hooks elsewhere, each against a truth computed beside it."""
