//! Who has had how much: turns go to the user who has had least.
//!
//! Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each user's counter goes up
//! by the tokens that are computed for them. Whoever comes anew starts where the least served of those present stands, so
//! that nobody saves turns up by staying away; and not before the clock, which goes as fast as the counters do on average (the
//! virtual time of fair queueing): or ever new users would each be less served than somebody who waits.

use std::collections::HashMap;

/// The users' counters.
#[derive(Default)]
pub(crate) struct Accounts {
    users: HashMap<u64, Account>,
    /// Users that are there.
    present: usize,
    /// What each would have had if all who were there had had the same.
    clock: f64,
}

#[derive(Default)]
struct Account {
    served: u64,
    /// Requests that are there.
    present: usize,
}

impl Accounts {
    /// A request of `user` comes. `waits`: another of theirs waits to be computed; who only reads a stream saves no turns up,
    /// either.
    pub fn enter(&mut self, user: u64, waits: bool) {
        if self.present == 0 {
            *self = Self::default();
        }
        let present = self.users.values().filter(|account| account.present > 0);
        let least = present.map(|account| account.served).min().unwrap_or(0);
        let start = least.max(self.clock as u64);
        // An absent user with less than that would start there anyway.
        self.users.retain(|_, account| account.present > 0 || account.served > start);
        let account = self.users.entry(user).or_insert(Account { served: start, present: 0 });
        self.present += usize::from(account.present == 0);
        account.present += 1;
        if !waits {
            account.served = account.served.max(start);
        }
    }

    /// A request of `user` goes.
    pub fn leave(&mut self, user: u64) {
        if let Some(account) = self.users.get_mut(&user) {
            account.present -= 1;
            self.present -= usize::from(account.present == 0);
        }
    }

    /// Tokens are computed for `user`.
    pub fn charge(&mut self, user: u64, tokens: usize) {
        if let Some(account) = self.users.get_mut(&user) {
            account.served += tokens as u64;
            self.clock += tokens as f64 / self.present.max(1) as f64;
        }
    }

    /// Where the counter of `user` stands.
    pub fn served(&self, user: u64) -> u64 {
        self.users.get(&user).map_or(0, |account| account.served)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newcomers_start_with_the_least_served_and_debts_are_remembered() {
        let mut accounts = Accounts::default();
        accounts.enter(1, false);
        accounts.charge(1, 100);
        accounts.enter(2, false);
        assert_eq!(accounts.served(2), 100);
        accounts.charge(2, 50);
        accounts.leave(2);
        accounts.enter(2, false);
        assert_eq!(accounts.served(2), 150, "who leaves and comes back has had it all the same");
        accounts.leave(2);
        accounts.charge(1, 200);
        accounts.enter(2, false);
        assert_eq!(accounts.served(2), 325, "turns are not saved up, and 1 is owed what 2 had more");
        accounts.leave(1);
        accounts.leave(2);
        accounts.enter(3, false);
        assert_eq!((accounts.served(3), accounts.users.len()), (0, 1), "after a rest all are equal");
    }

    #[test]
    fn ever_new_users_do_not_pass_one_who_waits() {
        let mut accounts = Accounts::default();
        accounts.enter(0, false);
        accounts.charge(0, 500);
        let mut strangers = 0;
        for stranger in 1..1000 {
            // One of them always waits already.
            accounts.enter(stranger, false);
            if stranger > 1 {
                accounts.leave(stranger - 1);
            }
            if accounts.served(0) <= accounts.served(stranger) {
                accounts.charge(0, 500);
            } else {
                accounts.charge(stranger, 500);
                strangers += 1;
            }
            assert!(accounts.users.len() < 10, "who has gone is forgotten");
        }
        assert!((400..600).contains(&strangers), "{strangers} of 999 turns");
    }

    #[test]
    fn a_lone_stream_saves_no_turns_up_for_a_prompt() {
        let mut accounts = Accounts::default();
        accounts.enter(1, false);
        accounts.enter(2, false);
        accounts.charge(1, 20);
        accounts.charge(2, 1000);
        accounts.enter(3, false);
        assert_eq!(accounts.served(3), 510);
        accounts.enter(1, false);
        assert_eq!(accounts.served(1), 510);
        accounts.charge(2, 300);
        accounts.enter(1, true);
        assert_eq!(accounts.served(1), 510, "who waits is owed it");
    }
}
