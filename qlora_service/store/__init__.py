"""The database: tables, migrations, and one file of queries per subject."""
