//! The last so many of something.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;

/// A set that forgets its oldest members.
pub(super) struct Recent<T> {
    limit: usize,
    order: VecDeque<T>,
    known: HashSet<T>,
}

impl<T: Copy + Eq + Hash> Recent<T> {
    pub(super) fn new(limit: usize) -> Recent<T> {
        Recent { limit, order: VecDeque::new(), known: HashSet::new() }
    }

    pub(super) fn contains(&self, item: T) -> bool {
        self.known.contains(&item)
    }

    /// True if it was not among them.
    pub(super) fn insert(&mut self, item: T) -> bool {
        if !self.known.insert(item) {
            return false;
        }
        self.order.push_back(item);
        if self.order.len() > self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_forgets_the_oldest_first() {
        let mut recent = Recent::new(2);
        assert!(recent.insert(1));
        assert!(!recent.insert(1));
        assert!(recent.insert(2));
        assert!(recent.insert(3));
        assert!(!recent.insert(3));
        assert!(!recent.contains(1) && recent.contains(2));
        assert!(recent.insert(1), "one was forgotten");
        assert_eq!(recent.known.len(), 2);
    }
}
