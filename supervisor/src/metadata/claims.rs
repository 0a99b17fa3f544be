//! Claims: locks by name, for what lives in a backend and not in the database.
//!
//! A transaction cannot span a backend's call. Whoever makes something in a backend and records it afterwards
//! shares a claim on its name meanwhile; whoever destroys it takes the claim for itself, looks once more whether a
//! record names it, and destroys it only then. Others that want a destroyed name wait until it is free.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The claims on one kind of names.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: Mutex<HashMap<String, Held>>,
    released: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// By so many.
    Shared(usize),
    Exclusive,
}

/// A claim; dropping it gives it up.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    name: String,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shares the claim on a name with all others that do; waits while someone has it alone. Blocks.
    pub(crate) fn share(&self, name: &str) -> Claim<'_> {
        let mut held = self.lock();
        loop {
            match held.get_mut(name) {
                Some(Held::Exclusive) => {
                    held = self.released.wait(held).unwrap_or_else(PoisonError::into_inner);
                }
                Some(Held::Shared(count)) => {
                    *count += 1;
                    break;
                }
                None => {
                    held.insert(name.to_owned(), Held::Shared(1));
                    break;
                }
            }
        }
        Claim { claims: self, name: name.to_owned() }
    }

    /// Takes the claim on a name alone; waits while anyone has it. Blocks.
    pub(crate) fn take(&self, name: &str) -> Claim<'_> {
        let mut held = self.lock();
        while held.contains_key(name) {
            held = self.released.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.insert(name.to_owned(), Held::Exclusive);
        Claim { claims: self, name: name.to_owned() }
    }

    /// Takes the claims on two names alone, in an order that lets no two calls wait for each other.
    pub(crate) fn take_two(&self, one: &str, other: &str) -> (Claim<'_>, Option<Claim<'_>>) {
        let first = self.take(one.min(other));
        let second = (one != other).then(|| self.take(one.max(other)));
        (first, second)
    }

    /// Takes the claim on a name alone if nobody has it.
    pub(crate) fn try_take(&self, name: &str) -> Option<Claim<'_>> {
        let mut held = self.lock();
        if held.contains_key(name) {
            return None;
        }
        held.insert(name.to_owned(), Held::Exclusive);
        Some(Claim { claims: self, name: name.to_owned() })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.lock();
        match held.get_mut(&self.name) {
            Some(Held::Shared(count)) if *count > 1 => *count -= 1,
            _ => {
                held.remove(&self.name);
            }
        }
        drop(held);
        self.claims.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_name_is_shared_or_taken() {
        let claims = Claims::default();
        let (one, two) = (claims.share("a"), claims.share("a"));
        assert!(claims.try_take("a").is_none());
        drop(one);
        assert!(claims.try_take("a").is_none());
        drop(two);
        let alone = claims.try_take("a").unwrap();
        assert!(claims.try_take("a").is_none());
        drop(claims.share("b"));
        drop(alone);
        assert!(claims.lock().is_empty());
    }

    #[test]
    fn waiters_get_their_turn() {
        let claims = Claims::default();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (claims, inside) = (&claims, &inside);
                scope.spawn(move || {
                    for round in 0..200 {
                        let pair = if (thread + round) % 2 == 0 { ("a", "b") } else { ("b", "a") };
                        let _both = claims.take_two(pair.0, pair.1);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        let (_first, second) = claims.take_two("a", "a");
        assert!(second.is_none());
    }
}
