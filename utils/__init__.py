"""Services that know nothing about radiance fields: errors, seeds, timing, files, logs, tables."""
