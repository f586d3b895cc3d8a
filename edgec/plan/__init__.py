"""From a profile and a budget to a Plan: candidates, allocation, constraints, and the YAML that a person can edit."""
