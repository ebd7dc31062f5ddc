//! Callers and their roles.

use super::job::Millis;

/// Permission that a token grants. Roles are independent, except that `Admin` includes the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Upload datasets, create jobs, and manage the caller's own datasets and jobs.
    Submit,
    /// Score pairs and completions, evaluate policies and generate texts.
    Score,
    /// Everything, including the jobs and datasets of other owners.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Role; 3] = [Role::Submit, Role::Score, Role::Admin];

    /// Returns the name in the store and in `bradley tokens create --roles`.
    pub fn name(self) -> &'static str {
        match self {
            Role::Submit => "submit",
            Role::Score => "score",
            Role::Admin => "admin",
        }
    }

    /// Returns the role with this name.
    pub fn parse(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// Proof of identity that a caller presented. It may become invalid during a long call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Id of a token in the database.
    Stored(String),
    /// SHA-256 of a token that a file declares.
    Declared([u8; 32]),
    /// Token of an OIDC issuer.
    Issued {
        /// Time of its end, in milliseconds since 1970.
        valid_until: Millis,
    },
}

/// Identity and permissions behind a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Name of the owner; jobs and datasets with this owner belong to the caller.
    pub owner: String,
    /// Roles of the caller.
    pub roles: Vec<Role>,
    /// The token that the caller presented; `None` if the server requires none.
    pub token: Option<Credential>,
}

impl Caller {
    /// Returns a caller with every permission: any client of a server without authentication, or
    /// the server itself.
    pub fn unrestricted() -> Caller {
        Caller {
            owner: String::new(),
            roles: vec![Role::Admin],
            token: None,
        }
    }

    /// Returns true if the caller has `role`.
    pub fn may(&self, role: Role) -> bool {
        self.roles.contains(&role) || self.is_admin()
    }

    /// Returns true if the caller may see everyone's jobs and datasets.
    pub fn is_admin(&self) -> bool {
        self.roles.contains(&Role::Admin)
    }

    /// Returns true if the caller may see jobs and datasets of `owner`.
    pub fn may_see(&self, owner: &str) -> bool {
        self.is_admin() || self.owner == owner
    }

    /// Returns the owner to which lists are restricted; `None` for an admin, who sees everything.
    pub fn visible_owner(&self) -> Option<&str> {
        (!self.is_admin()).then_some(self.owner.as_str())
    }

    /// Returns the owner to which a list of `whose` resources is restricted; `None` if everyone's
    /// are in it.
    pub fn listed_owner(&self, whose: Whose) -> Option<&str> {
        match whose {
            Whose::Own => Some(self.owner.as_str()),
            Whose::Visible => self.visible_owner(),
        }
    }
}

/// Selects the owners whose jobs or datasets are in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Only the caller, even if the caller is an administrator.
    Own,
    /// All whose resources the caller may see: everyone for an administrator.
    Visible,
}

impl From<bool> for Whose {
    /// Reads the field `own` of a request.
    fn from(own: bool) -> Whose {
        if own { Whose::Own } else { Whose::Visible }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_admin_sees_what_others_own() {
        let caller = Caller {
            owner: "team-a".into(),
            roles: vec![Role::Submit],
            token: None,
        };
        assert!(caller.may_see("team-a") && !caller.may_see("team-b") && !caller.may_see(""));
        assert!(
            caller.may(Role::Submit)
                && !caller.may(Role::Score)
                && caller.visible_owner() == Some("team-a")
        );
        let admin = Caller {
            owner: "ops".into(),
            roles: vec![Role::Admin],
            token: None,
        };
        assert!(
            admin.may_see("team-a")
                && Role::ALL.iter().all(|r| admin.may(*r))
                && admin.visible_owner().is_none()
                && admin.listed_owner(Whose::Visible).is_none()
                && admin.listed_owner(Whose::Own) == Some(admin.owner.as_str())
        );
    }
}
