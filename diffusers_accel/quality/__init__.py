"""Quality: metrics that compare pictures, and the fit of caching constants. It builds on the public functions alone."""
