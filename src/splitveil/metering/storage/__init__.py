"""Where keys and leases are kept: SQLite by default, PostgreSQL by URL."""
