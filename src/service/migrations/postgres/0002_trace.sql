-- The trace of the call that made the job, as W3C's traceparent.
ALTER TABLE jobs ADD COLUMN trace TEXT;
