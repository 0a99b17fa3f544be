//! A short soak; `cargo xtask soak` runs long ones.

use std::time::Duration;

use anyhow::Result;
use davit_integration::soak::{self, Plan};

use crate::root;

#[test]
fn no_exit_is_lost_and_nothing_is_left_whatever_is_killed() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let plan = Plan { daemon_kills: Duration::from_millis(700), ..Plan::new(100, 1) };
    println!("{:?}", soak::run(&plan)?);
    Ok(())
}
