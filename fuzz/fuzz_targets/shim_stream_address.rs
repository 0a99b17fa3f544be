//! See `davit_shim::inputs::stream_address`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| davit_fuzz::shim::stream_address(data));
