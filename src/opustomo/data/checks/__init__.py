"""What ``check`` looks at, one module per subject; each returns findings and changes nothing."""
