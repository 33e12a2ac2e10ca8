"""Metadata fields: MD_FIELD_ID, the access masks and the special handling of each field."""
