//! Who has had how much: turns go to the user who has had least.
//!
//! Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each user's counter goes up
//! by the tokens that are computed for them. Whoever comes anew starts where the least served of those present stands, so
//! that nobody saves turns up by staying away.

use std::collections::HashMap;

/// The users' counters.
#[derive(Default)]
pub(crate) struct Accounts(HashMap<u64, Account>);

#[derive(Default)]
struct Account {
    served: u64,
    /// Requests that are there.
    present: usize,
}

impl Accounts {
    /// A request of `user` comes.
    pub fn enter(&mut self, user: u64) {
        let present = self.0.values().filter(|account| account.present > 0);
        let least = present.map(|account| account.served).min();
        // An absent user with less than that would start there anyway.
        self.0.retain(|_, account| account.present > 0 || least.is_some_and(|least| account.served > least));
        let fresh = || Account { served: least.unwrap_or(0), present: 0 };
        self.0.entry(user).or_insert_with(fresh).present += 1;
    }

    /// A request of `user` goes.
    pub fn leave(&mut self, user: u64) {
        if let Some(account) = self.0.get_mut(&user) {
            account.present -= 1;
        }
    }

    /// Tokens are computed for `user`.
    pub fn charge(&mut self, user: u64, tokens: usize) {
        if let Some(account) = self.0.get_mut(&user) {
            account.served += tokens as u64;
        }
    }

    /// Where the counter of `user` stands.
    pub fn served(&self, user: u64) -> u64 {
        self.0.get(&user).map_or(0, |account| account.served)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newcomers_start_with_the_least_served_and_debts_are_remembered() {
        let mut accounts = Accounts::default();
        accounts.enter(1);
        accounts.charge(1, 100);
        accounts.enter(2);
        assert_eq!(accounts.served(2), 100);
        accounts.charge(2, 50);
        accounts.leave(2);
        accounts.enter(2);
        assert_eq!(accounts.served(2), 150, "who leaves and comes back has had it all the same");
        accounts.leave(2);
        accounts.charge(1, 200);
        accounts.enter(2);
        assert_eq!(accounts.served(2), 300, "turns are not saved up");
        accounts.leave(1);
        accounts.leave(2);
        accounts.enter(3);
        assert_eq!((accounts.served(3), accounts.0.len()), (0, 1), "after a rest all are equal");
    }
}
