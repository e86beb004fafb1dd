"""The audit: attacks × cuts × defences × texts, measured once each, kept in rows that a run resumes from."""
