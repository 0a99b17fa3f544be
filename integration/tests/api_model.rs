//! Random calls of the whole metadata API, which the daemon must answer as the model does (`davit_integration::model`).
//!
//! A failure prints its seed and the steps that it takes; `DAVIT_SEED` runs another seed, and `DAVIT_STEPS` that many steps.
//! `cargo xtask model` draws seeds that nobody has run: a check of a change is to tell of that change alone.

use anyhow::{Context, Result, bail, ensure};
use davit_integration::bins;
use davit_integration::model::rule::Rule;
use davit_integration::model::run::{Plan, Summary, run};
use davit_integration::model::subject;

use crate::root;

/// Sequences that between them find all seeded bugs.
const SEEDS: [u64; 6] = [1, 2, 3, 4, 5, 6];

/// A number from the environment.
fn number(name: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    Ok(Some(text.parse().with_context(|| format!("{name}={text}"))?))
}

fn run_and_check(plan: &Plan) -> Result<Summary> {
    let summary = run(plan, subject::ours)?;
    eprintln!("seed {}: {summary}", plan.seed);
    ensure!(summary.rare().is_empty(), "less than 2 % of the calls: {:?}", summary.rare());
    ensure!(summary.kills > 0 && summary.collections > 0, "{summary:?}");
    Ok(summary)
}

#[test]
fn the_daemon_answers_as_the_model_does() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let steps = number("DAVIT_STEPS")?.unwrap_or(1500);
    let seed = number("DAVIT_SEED")?.unwrap_or(20_261_121);
    let plan = Plan { seed, steps, kills: 150, without: Vec::new(), seeded: Vec::new() };
    run_and_check(&plan)?;
    Ok(())
}

/// The model is not ours: containerd answers as it does as well, but for the rules that its version does not have.
#[test]
fn containerd_answers_as_the_model_does() -> Result<()> {
    if !root() || bins::on_path("containerd").is_none() {
        eprintln!("skipped: needs root and containerd (apt-get install containerd)");
        return Ok(());
    }
    let without = subject::peer()?.unknown_rules();
    let plan = Plan { seed: 32, steps: 1000, kills: 100, without, seeded: Vec::new() };
    let summary = run(&plan, subject::peer)?;
    eprintln!("seed {}: {summary}", plan.seed);
    Ok(())
}

/// A comparison that finds nothing proves nothing: of models that each lack one rule all must come to differ.
#[test]
fn seeded_bugs_are_found() -> Result<()> {
    if !root() {
        return Ok(());
    }
    let mut missed = Rule::ALL.to_vec();
    for seed in SEEDS {
        let plan = Plan { seed, steps: 2000, kills: 150, without: Vec::new(), seeded: missed.clone() };
        let summary = run_and_check(&plan)?;
        missed.retain(|rule| !summary.caught.contains_key(rule));
        if missed.is_empty() {
            return Ok(());
        }
    }
    bail!("not found in {} times 2000 steps: {missed:?}", SEEDS.len());
}
