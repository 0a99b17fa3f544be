//! The shim once more, as another build: what the tests of upgrades upgrade to and from.

fn main() -> std::process::ExitCode {
    davit_shim::main("other")
}
