"""A sweep as a person reads it: tables, figures and the page; computes no statistics."""
