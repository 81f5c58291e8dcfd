//! Tests of the image store as a whole, without a registry.
