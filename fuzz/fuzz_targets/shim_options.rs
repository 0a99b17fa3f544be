//! See `davit_shim::inputs::options`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::shim::options(data));
