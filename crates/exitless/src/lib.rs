//! exitless
