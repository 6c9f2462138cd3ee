"""Tests of diagnosis: records become statuses, findings and reports."""
