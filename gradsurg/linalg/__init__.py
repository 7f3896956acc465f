"""The only code that touches P numbers: Gramians, weighted sums and inner products of rows; for every higher room."""
